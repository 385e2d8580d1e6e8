"""Remote: streams of this machine that are stepped on a server."""
