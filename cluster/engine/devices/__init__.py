"""Devices: what executes a step plan. `base` is the seam; `cpu` computes with torch; `paced` computes nothing and takes
exactly the time a latency model says. Import the one you need: this package itself loads neither torch nor numpy."""
