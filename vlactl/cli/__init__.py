"""The command line. Imports no torch: commands plan, supervise and print; workers compute."""
