"""What tools and runtimes of others do with an exported file; `make interop` runs them and writes docs/interop.md."""
