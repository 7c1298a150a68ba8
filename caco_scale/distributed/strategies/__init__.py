"""How the processes of a launch train one model: one interface, one file an engine."""
