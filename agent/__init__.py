"""What runs on hosts, sent as one file with its libraries. `main` describes how it is called."""
