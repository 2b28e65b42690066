import signal
import sys

if sys.argv[:1] == ["-m"]:
  # A program is starting: until its flags are read, Ctrl-C ends it without a traceback out of an import.
  signal.signal(signal.SIGINT, signal.SIG_DFL)
