"""Fault injection: the commands are killed, starved, damaged and run beside each other."""
