"""One test for each kind of public bug report of programs like this one."""
