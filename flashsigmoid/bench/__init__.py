"""How fast, how wrong, beside whom: named problems, interleaved timing, peers found at run time, records."""
