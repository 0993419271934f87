"""What Rowcast costs, measured against its peers: `make bench`. See docs/performance.md."""
