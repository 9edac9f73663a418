"""What `lyra bench` measures: rows, each a file in `rows/`, and the frame that times their contestants side by side."""
