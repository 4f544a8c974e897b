"""Programs that stand in for engines which do not run on this machine."""
