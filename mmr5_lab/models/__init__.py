"""Load a vision-language model, know its memory beforehand, run it here or ask a server."""
