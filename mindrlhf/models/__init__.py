"""Models that the project trains, a package each."""
