"""What people see: progress, tables, pictures, the HTML report and trackers."""
