"""What a run has written, shown: the page in its folder, a plot in the terminal, several runs side by side."""
