"""How a kernel wheel is made: source, toolchain, graph, compile, wheel, inspection, wheelhouse."""
