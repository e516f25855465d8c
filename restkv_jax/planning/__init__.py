"""What a program will hold, read, write, compute and send, from compiling it alone; nothing runs."""
