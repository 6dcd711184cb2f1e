"""The agent: runs on hosts, sent as one file with its libraries. `main` documents its interface."""
