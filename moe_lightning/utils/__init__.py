"""Below all other packages: argument checks, whole files, command lines, where a result comes from."""
