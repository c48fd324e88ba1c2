"""Success rates: every (task, trial) once, with intervals."""
