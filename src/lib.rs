//! The lock daemon of libvirt: it holds the locks on the disks of virtual machines, so that two
//! machines never write one disk, and so that libvirtd can restart without losing them.
//!
//! # The map
//!
//! A room is a folder. From the top down: `main.rs`, `life/`, the words (`cli.rs`, `config.rs`, `exit.rs`),
//! `server/`, `restart/`, `custody/`, `desk/`, `locks/`, `log/`, `host/`; and `wire/` below `server/`, beside
//! `restart/`, `custody/` and `locks/`. A room uses those below it, never one above or beside it, and no
//! file imports one that imports it. `tests/house.rs` holds this and more against the code, and this map.
//!
//! A request travels one way: the poll, the connection's turn, a frame cut by its conversation, dispatch,
//! the service, custody's door, the table, the file, the ledger, the reply into the same turn's output, one
//! write. What it means for others (an owner to be fenced, room for somebody who waits) is left as an
//! order, which the reactor carries out behind the turn. An upgrade closes the ledger; the next image reads
//! it, adopts its descriptors and goes on.
//!
//! A call that needs a file on a share leaves an errand at `server/shares/` and waits. A helper, which is this
//! program once more, does the errand; then the call is worked on from its beginning, and finds what became of it.
//!
//! ```text
//! main.rs                 from the words to the exit code
//! virtlockctl.rs          the other program: its words go to ctl/
//! lib.rs                  this map
//! ctl/                    virtlockctl: who has this disk?
//!   options.rs            the words of its command line, and the help
//!   status.rs             what is held
//!   who.rs                who has a disk
//!   events.rs             what happens
//!   metrics.rs            numbers for a monitor
//!   audit.rs              which disks no lock protects
//!   doctor.rs             is everything as it must be?
//!   exec.rs               a command that has locks
//!   keeper.rs             that command and all that it starts, until nothing of it is left
//!   ask.rs                a connection to a daemon
//!   view.rs               what a daemon says, gathered
//!   look.rs               a look at a file that may never answer
//!   patience.rs           the process that looks, and how long it is waited for
//!   kernel.rs             what the kernel knows of locks
//!   guests.rs             the guests that run, and what they have open
//!   leases.rs             libvirt's names for the leases of disks
//!   sha256.rs             the sum that they are
//!   show.rs               tables and JSON
//!   text.rs               bytes, uuids and times as text
//!   exit.rs               how a command ends
//! cli.rs                  the command line, with every form that getopt_long takes
//! config.rs               virtlockd.conf: libvirt's grammar, and the keys known here
//! exit.rs                 exit codes, and the error that carries one to main
//! life/                   the process: how it starts, who was here before, how it goes on
//!   start.rs              the order of a start
//!   plan.rs               what is known before there is a daemon
//!   cold_start.rs         what a daemon that was killed whole has left
//!   serve.rs              from a plan to a daemon that serves, and the run to its end
//!   takeover.rs           the state that an earlier image left: a ledger, or libvirt's document
//!   go_on.rs              from that state to a running reactor
//!   guardian.rs           the process that was started: it keeps pid, signals and exec, and a reactor alive
//!   understudy.rs         a copy of it that goes on should a successor not serve
//!   store.rs              the service manager's store, which keeps everything while no daemon runs
//!   kept.rs               a start that finds everything there
//!   posix_locks.rs        locks that ended with another process, taken again
//!   sweep.rs              what a reactor that died left open and nobody knows of
//!   rehearsal.rs          the successor's trial run beside the running daemon
//!   standard.rs           descriptors 0 to 2, where a client's socket or a disk has their numbers
//!   helper.rs             this program as a helper of its daemon, and nothing else
//!   way_back.rs           back to libvirt's daemon, if this one cannot take over from it
//! server/                 what passes: a new reactor makes all of it anew
//!   reactor.rs            the loop; owns the pieces, lends them, carries out orders
//!   hall.rs               what a call may use, and the orders that it may leave
//!   lines.rs              who waits for a piece of the daemon's time
//!   deadlines.rs          what is to happen when
//!   watch.rs              the poll, and what a readiness event is about
//!   notes.rs              leases whose files are to say who has them
//!   reserve.rs            descriptors for the time when there are no others
//!   waiting_room.rs       clients that there is no room for
//!   flow.rs               whether a connection goes on after a frame
//!   ground.rs             what is said of the mounts and directories that locks are on
//!   stop.rs               the end of the daemon
//!   keep.rs               the end for which everything is kept until the next start
//!   upgrade.rs            SIGUSR1: the successor is checked, then everything is handed to it
//!   clients/              one connection, from its coming to its end
//!     accept.rs           who may connect, and whether there is room
//!     connection.rs       the passing half of a client: bytes on their way
//!     conversation.rs     bytes in, frames out; no socket
//!     turn.rs             what one connection sent is read, worked on and answered
//!     poison.rs           a frame of which the daemon died again and again
//!     recovery.rs         what a reactor that died left of a client, and of its call
//!   services/             the three programs that clients call
//!     dispatch.rs         from a frame to its procedure, in libvirt's order of checks
//!     lock.rs             the lock program
//!     admin/              the admin program
//!       clients.rs        a server's clients: who they are, and their end on demand
//!       parameters.rs     a server's numbers: workers and client limits
//!       logging.rs        log outputs and filters
//!     status/             the status program, which is our own
//!       lists.rs          what is held and by whom, in pages
//!       news.rs           what happened, as messages
//!   owners/               owners and their processes
//!     fence.rs            who must die: SIGTERM, SIGKILL, and what follows
//!     watched.rs          owners without a connection of their own
//!     estates.rs          what the dead held is freed, a few locks at a time
//!   shares/               files on shares, which may not answer: nothing here touches one
//!     crew.rs             the helpers of one share, and what they are to do
//!     purpose.rs          whom work there waits for, and what it is for
//!     under_way.rs        calls that wait for them, and who waits for these
//! restart/                ways from one image of the process to the next
//!   bag.rs                everything that a daemon holds, in one socket
//!   handover.rs           is there a program that can take over; the exec
//!   libvirt_json/         libvirt's state document
//!     read.rs             what libvirt's daemon left, as a state
//!     write.rs            a state, as libvirt's daemon reads it
//! custody/                what lasts: the door, which writes each change down and makes it
//!   locking.rs            the door's part for locks: table, file and event put together
//!   state.rs              all that lasts, as one value that events change
//!   event.rs              every change, as data
//!   counters.rs           how often what happened
//!   news.rs               what happened just now, for those who listen
//!   entries.rs            a state as the fewest events that say it
//!   encoding.rs           an event as bytes, and back
//!   ledger.rs             the events in a memory file
//!   earlier.rs            the same for a program of before today's format
//!   cold.rs               the state of a daemon that was killed whole, taken again by name
//!   adopt.rs              the numbers of a saved state become open descriptors
//!   renumber.rs           the same state after its descriptors went to another process
//!   descriptor.rs         a descriptor in the state: open, or its number
//!   elsewhere.rs          the door's part for files that other processes work on
//!   unwanted.rs           a lock that was had elsewhere and that nobody wants
//!   roll.rs               things found by the number of a descriptor
//!   served.rs             the clients that are served, in the order of connecting
//!   servers.rs            the two servers' numbers and sockets
//!   clients.rs            a client as far as it lasts
//!   own_connections.rs    for which domains processes speak over connections of their own
//!   fences.rs             who is to die, and whose death is waited for
//!   settings.rs           the process's own
//!   since.rs              what happened behind a mark in the ledger
//! desk/                   what a reactor that dies leaves to the next one
//!   control.rs            what guardian and reactor have to say to each other
//!   layout.rs             where what lies there
//!   slot.rs               what clients have on their way behind their turns
//!   turn.rs               the turn in progress
//! locks/                  who holds what
//!   table.rs              decisions, on plain data
//!   lease.rs              a kernel's lock on a file: taken, looked after, let go
//!   again.rs              a lock taken again by name
//!   job.rs                the other work on a resource's file, as values
//!   errand.rs             all that work as messages to a process that may hang
//!   place.rs              where a resource's file is
//!   lockspace.rs          a lockspace's directory
//!   holder.rs             who has it, in words
//!   note.rs               who has it, written into a lease's file
//! wire/                   bytes to messages and back: no input or output, no state
//!   xdr.rs                words, strings and lists
//!   frame.rs              a length, a header, a payload
//!   lock.rs               the calls of the lock program
//!   keepalive.rs          PING and PONG
//!   error.rs              the error of a failed reply
//!   admin/                the admin program
//!     program.rs          its numbers and procedures
//!     call.rs             calls
//!     answer.rs           what they return
//!     parameter.rs        named values
//!   status/               the status program
//!     program.rs          its numbers and procedures
//!     call.rs             calls
//!     answer.rs           what they return
//!     happened.rs         messages about what happened
//! log/                    libvirt's log settings and lines, on top of tracing
//!   level.rs              the four levels
//!   settings.rs           outputs and filters, as people write them
//!   resolve.rs            which settings count
//!   saved.rs              the settings as they are passed on
//!   line.rs               a record and its layout
//!   stream.rs             lines to a file or standard error
//!   datagram.rs           records to syslog and the journal
//!   output.rs             one open output
//!   logger.rs             filters and outputs, and their exchange
//!   subscriber.rs         from an event of tracing to a record
//!   aside.rs              what is said in a process without a log, for one that has one
//! host/                   what a Unix daemon owes its host; the only unsafe
//!   errno.rs              error numbers, also those without a name
//!   refusal.rs            what the host refused, as words
//!   patience.rs           tries again what may succeed a moment later
//!   file.rs               files and their locks
//!   fdinfo.rs             what the kernel itself says of an open file
//!   mounts.rs             what is mounted where, and what locks there are worth
//!   mount_table.rs        the list of mounts, kept as it is now
//!   whereabouts.rs        whether a file is on this host, without asking a share
//!   whole_file.rs         a file read whole without waiting
//!   paths.rs              libvirt's default paths
//!   pid_file.rs           the pid file and its lock
//!   descriptors.rs        descriptors over the start of another program
//!   memory.rs             a memory file written through a mapping
//!   scribe.rs             a process that writes where it may hang, never waited for
//!   shared.rs             memory that outlives the process that wrote it
//!   heap.rs               the allocator's memory
//!   limits.rs             the limit of open files
//!   listen.rs             listening sockets, made or inherited
//!   passing.rs            descriptors in messages
//!   stream.rs             connections: read, write, who the peer is
//!   process.rs            processes through pidfds; the number of our own
//!   program.rs            a program to be executed, prepared
//!   leash.rs              a process group that does not outlive this process
//!   apart.rs              a copy of this process without its files, which may become another program
//!   helper.rs             a process that does what may hang, one job after the other, or undoes it
//!   closer.rs             processes that close files where that may hang
//!   privileges.rs         what a process gives up that it may do and does not need
//!   signals.rs            signals as readable events
//!   child.rs              a child that ends with this process
//!   descendants.rs        all that this process has started, and what that has started
//!   clock.rs              the monotonic clock; the calendar
//!   clone.rs              copies of this process, waited for and ended
//!   terminal.rs           the width of a terminal
//!   timer.rs              one timer for the earliest deadline
//!   daemonize.rs          the start in the background
//!   environment.rs        variables meant for this process alone
//!   names.rs              the names of users and groups
//!   note.rs               the note in a lease file, as text
//!   notify.rs             word to the service manager
//!   text.rs               what the C library makes of texts
//! ```
//!
//! `dist/` beside them has no code of the daemon: units, the default configuration, manual pages, the list of
//! differences from libvirt's daemon, and packages with their scripts.

#![cfg_attr(
    not(test),
    deny(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::unreachable,
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects
    )
)]

pub mod cli;
pub mod config;
pub mod ctl;
pub mod custody;
pub mod desk;
pub mod exit;
pub mod host;
pub mod life;
pub mod locks;
pub mod log;
pub mod restart;
pub mod server;
pub mod wire;
