"""What one of several router processes says for all of them."""

from __future__ import annotations

import asyncio

from prometheus_client.parser import text_string_to_metric_families
from tandem.cluster.auth import MemberCredentials, MemberTLS
from tandem.cluster.config import RouterConfig, SecurityConfig
from tandem.cluster.metrics import RouterMetrics
from tandem.cluster.ports import pin_ports
from tandem.cluster.proto.tandem_internal_v1_pb2_grpc import add_SiblingServicer_to_server
from tandem.cluster.rpc import make_server
from tandem.cluster.tls import Identity
from tandem.router.service import Readiness
from tandem.router.siblings import Siblings, merge_expositions

CONFIG = RouterConfig(processes=2, http_port=0, grpc_port=0, registry_port=0)
OURS, THEIRS = (MemberCredentials.load(SecurityConfig(secret=secret * 4)) for secret in ("0123456789", "abcdefghij"))


def test_series_of_several_stand_under_one_head() -> None:
    first = '# HELP a_total About a.\n# TYPE a_total counter\na_total{model="m {1}"} 2.0\na_total{model="n"} 1.0\n'
    other = "# HELP b About b.\n# TYPE b gauge\nb 7.0\n"
    assert merge_expositions({"0": first + other, "1": other + first}, "router") == (
        "# HELP a_total About a.\n# TYPE a_total counter\n"
        'a_total{router="0",model="m {1}"} 2.0\na_total{router="0",model="n"} 1.0\n'
        'a_total{router="1",model="m {1}"} 2.0\na_total{router="1",model="n"} 1.0\n'
        '# HELP b About b.\n# TYPE b gauge\nb{router="0"} 7.0\nb{router="1"} 7.0\n'
    )


def test_what_a_router_renders_can_be_merged_and_parsed() -> None:
    texts = {}
    for process, inside in (("0", 3), ("1", 5)):
        metrics = RouterMetrics("m")
        metrics.set_in_flight(inside)
        metrics.observe_inter_token(0.01)
        texts[process] = metrics.render_own().decode()
    merged = list(text_string_to_metric_families(merge_expositions(texts, "router")))
    names = [family.name for family in merged]
    assert len(set(names)) == len(names), "a family appears once"
    alone = list(text_string_to_metric_families(texts["0"]))
    assert set(names) == {family.name for family in alone}
    flying = next(family for family in merged if family.name == "tandem:requests_in_flight")
    assert [(sample.labels["router"], sample.value) for sample in flying.samples] == [("0", 3.0), ("1", 5.0)]
    assert all("router" in sample.labels for family in merged for sample in family.samples)


def test_a_sibling_is_asked_with_the_clusters_secret_and_named_where_it_does_not_answer() -> None:
    async def scene() -> None:
        pinned = pin_ports(CONFIG)
        metrics = [RouterMetrics("m") for _ in range(2)]
        zero = Siblings(pinned.each_process()[0], metrics[0], credentials=OURS)
        one = Siblings(pinned.each_process()[1], metrics[1], credentials=OURS)
        stranger = Siblings(pinned.each_process()[0], metrics[0], credentials=THEIRS)
        one.watch(lambda: Readiness(ready=True))
        metrics[1].set_in_flight(4)
        metrics[1].watch_queue(lambda: {"batch": 2})

        alone = [account.describe() for account in await zero.accounts()]
        assert [account["ready"] for account in alone] == [False, False]
        assert (alone[0]["reason"], alone[1]["reason"]) == ("starting", "it does not answer its siblings: UNAVAILABLE")
        assert b'tandem:router_up{router="1"} 0.0' in await zero.render_metrics()
        await zero.close()

        server = make_server(OURS)
        add_SiblingServicer_to_server(one, server)
        OURS.listen(server, f"127.0.0.1:{pinned.registry_ports[1]}")
        await server.start()
        try:
            told = (await zero.accounts())[1].describe()
            assert told["registry"] == f"127.0.0.1:{pinned.registry_ports[1]}"
            assert (told["process"], told["ready"], told["requests_inside"]) == (1, True, 4)
            assert told["choices_waiting"] == {"batch": 2}
            text = await zero.render_metrics()
            assert b'tandem:router_up{router="1"} 1.0' in text
            assert b'tandem:requests_in_flight{router="1",model_name="m"} 4.0' in text
            refused = (await stranger.accounts())[1].describe()
            assert refused["reason"] == "it does not answer its siblings: UNAUTHENTICATED"
        finally:
            for siblings in (zero, one, stranger):
                await siblings.close()
            await server.stop(None)

    asyncio.run(scene())


def test_one_process_alone_has_no_label() -> None:
    metrics = RouterMetrics("m")
    text = asyncio.run(Siblings(RouterConfig(), metrics).render_metrics())
    assert b'tandem:requests_in_flight{model_name="m"} 0.0' in text
    assert b"router=" not in text


def test_a_sibling_that_listens_everywhere_says_what_its_certificate_must_hold() -> None:
    async def scene(host: str, server_name: str | None) -> str:
        tls = MemberTLS(identity=Identity(cert=b"", key=b""), ca=b"", server_name=server_name)
        config = RouterConfig(host=host, processes=2, http_port=1, grpc_port=2, registry_port=3)
        siblings = Siblings(config, RouterMetrics("m"), credentials=MemberCredentials(tls=tls))
        account = (await siblings.accounts())[1]
        await siblings.close()
        return account.error

    hint = "asked at 127.0.0.1: its certificate must hold that, or security.tls_server_name a name in it"
    assert hint in asyncio.run(scene("0.0.0.0", None))
    for host, name in (("0.0.0.0", "member"), ("127.0.0.1", None)):
        assert asyncio.run(scene(host, name)).startswith("it does not answer its siblings: ")
        assert "certificate" not in asyncio.run(scene(host, name))
