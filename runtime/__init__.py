"""The command line, the machine, and how a program is interrupted."""
