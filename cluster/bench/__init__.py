"""`bench`: open-loop load and goodput reports against any OpenAI-style endpoint."""
