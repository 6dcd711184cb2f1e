"""What all packages use: configuration, archs, stacks, files, sources, errors, processes and the console."""
