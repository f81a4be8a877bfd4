"""Memory, traffic and hours of a parallel plan, by arithmetic: python -m mindrlhf.plan CONFIG."""
