"""What a host is: facts, GPUs, jobs, logs; nothing here changes it."""
