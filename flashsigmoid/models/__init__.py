"""Models: a frozen Config and a module tree each. No training code, no logging; import the file you need."""
