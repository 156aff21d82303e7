"""What one grammar may cost: time, memory and number are bounded before it is used."""

MIB = 2**20

# ---- of one grammar, measured on it before it is used ----
COMPILE_CPU_S = 2  # whole seconds: the kernel counts in these
COMPILE_WALL_S = 20.0  # on a machine that is busy with other things
COMPILE_BYTES = 256 * MIB
MASK_CPU_S = 0.05  # of the slowest mask but one
TRIED_TOKENS = 24  # how far the trial goes

# ---- of one step ----
MAX_FORCED_TOKENS = 64  # that are appended to one output at once
FORCED_CPU_S = 0.005  # from which on no more are looked for, in all outputs together

# ---- of all ----
MAX_IDLE_GRAMMARS = 256  # compiled ones without a request, and errors that are remembered
MAX_IDLE_BYTES = 256 * MIB

# ---- of the processes ----
MASK_TIMEOUT_S = 10.0  # for the masks of one step, before the process is taken for hung
KEEP_TIMEOUT_S = 30.0  # for compiling what the trial has compiled
MAX_FAILED_STARTS = 3
RESTART_BACKOFF_S = 0.5
