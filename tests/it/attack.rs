//! What can be done to a host from its port, each with an honest client beside it: the host answers as it should, nothing reaches a
//! plugin that was not asked for it, and what it has taken it gives back. `make attack` shows the table.

mod answers;
mod connections;
mod heads;
mod slow;
mod smuggling;
