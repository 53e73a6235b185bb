//! The command line: arguments to a configuration to one of the commands.

fn main() {}
