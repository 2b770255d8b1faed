"""The stages on a GPU: one stage a file. See `launch.mojo` for what every kernel begins and ends with."""
