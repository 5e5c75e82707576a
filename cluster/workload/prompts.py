"""Real prompts that ship with the package: what people ask a small assistant; short and long, prose, code, numbers."""

from __future__ import annotations

PROMPTS: tuple[str, ...] = (
    "Explain in three sentences why the sky is blue and the sunset is red.",
    "Write a Python function `median(values: list[float]) -> float` that does not use any library, with a docstring.",
    "Translate into French and then into German: 'The train leaves at seven, so be at the station by half past six.'",
    "A bakery baked 40 loaves. It sold 24 before noon and a third as many after. How many are left? Show the steps.",
    "I have eggs, rice, spinach and half a lemon. Suggest a dinner for two and list the steps with times.",
    (
        "Summarize this paragraph in one sentence: Large language models answer a request in two phases. In the first, "
        "they read the whole prompt at once and produce the first word of the answer; this phase keeps the processor's "
        "arithmetic units busy. In the second, they produce one word at a time, and each word requires reading all of "
        "the model's weights from memory, so that memory bandwidth is the limit. Running both phases on the same "
        "machine makes each disturb the other, which is why some systems separate them."
    ),
    "What is the difference between a process and a thread? Give one example where each is the better choice.",
    "Write a polite e-mail to a landlord asking to have a dripping kitchen tap repaired this week.",
    "List five things to check before riding a bicycle after a long winter.",
    (
        "Review this SQL and say what is wrong with it, then write it correctly:\n\n"
        "SELECT customer, SUM(amount)\nFROM orders\nWHERE SUM(amount) > 100\nGROUP BY customer\nORDER BY 2 DESC;"
    ),
    "Who wrote 'Pride and Prejudice', and what is the book about? Answer for a twelve-year-old.",
    (
        "Continue the story for a paragraph: The lighthouse had been dark for eleven years when, on the first night of "
        "November, Marta saw its beam sweep over the harbor and stop at her window."
    ),
    "What are the seasons in Australia, and in which months do they fall?",
    (
        "A train leaves Lyon at 14:10 and arrives in Paris, 465 km away, at 16:07. What is its average speed in "
        "kilometers per hour, to the nearest whole number?"
    ),
    'Complete the function:\n\ndef is_palindrome(text: str) -> bool:\n    """Ignore case, spaces and punctuation."""\n',
    "Give me three names for a small bookshop by the sea, each with a one-line slogan.",
    "How does a vaccine teach the body to recognize a virus? Use an everyday comparison.",
    "Turn this into a numbered list: mix flour and salt, add water slowly, knead ten minutes, rest one hour, bake.",
    (
        "Which of these numbers are prime, and why are the others not?\n\n"
        "21, 23, 27, 29, 31, 33, 37, 39, 41, 49, 51, 53, 57, 59, 61"
    ),
    "My laptop does not find the wireless network any more, but my phone does. What should I try, in which order?",
)
