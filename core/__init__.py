"""The nouns, their loading and checking, the errors, and the two doors out: shell and console."""
