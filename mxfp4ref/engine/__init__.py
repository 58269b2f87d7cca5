"""In a server: calls that a running engine recorded, replayed; a recorder for engines without one."""
