"""Changes of a host: plans and their steps, the trial and the cut-over."""
