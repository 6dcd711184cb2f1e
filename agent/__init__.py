"""What runs on hosts: one file there, of nothing but the standard library. `main` tells how it is called."""
