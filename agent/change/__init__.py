"""How a host is changed: plans, their steps, the trial and the cut-over."""
