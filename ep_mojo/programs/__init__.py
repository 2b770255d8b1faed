"""What the `ep-mojo` command runs: `ep_mojo.cli` reads the arguments and imports these when they are needed."""
