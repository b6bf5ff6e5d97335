"""Below all other packages: argument checks, atomic files, checkpoints, errors, command lines, provenance."""
