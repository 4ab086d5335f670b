"""Studies: a function each that runs recipes and writes records. What is drawn from them is report/'s."""
