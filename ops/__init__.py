"""How a host is kept: seen, understood and cared for."""
