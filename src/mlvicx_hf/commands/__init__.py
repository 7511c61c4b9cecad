"""The command `mlvicx`: arguments in, exit code out; one small module a subcommand."""
