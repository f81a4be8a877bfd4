"""What only CPUs need: stand-ins for operators that MindSpore has for NPUs alone, and for sink mode."""
