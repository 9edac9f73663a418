"""What is timed, one subject and framework a file: functions that take plain data and return a Work."""
