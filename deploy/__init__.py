"""How a host is changed: facts, a plan, and an agent that applies it."""
