"""Running a kernel that may do anything, in a process of its own or in this one."""
