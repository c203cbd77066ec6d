// The init of containers that ask for one (--init): PID 1 that starts the program, passes signals on to it, reaps
// whatever becomes an orphan, and ends as the program ends.
//
// It is C, and runs before Go's runtime starts, because each such container pays for it: it touches a few pages of a
// binary that is mapped anyway, where a Go program would need megabytes of its own.

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

static const char name[] = "docker-init";

static int called_as_init(const char *argv0)
{
	const char *slash = strrchr(argv0, '/');
	return strcmp(slash ? slash + 1 : argv0, name) == 0;
}

static void run(char **argv, const sigset_t *before)
{
	// A group of its own, in the foreground of the terminal: ^C is for the program, not for init. Without a terminal
	// the second fails, which is fine.
	setpgid(0, 0);
	signal(SIGTTOU, SIG_IGN);
	int tty = open("/dev/tty", O_RDWR | O_CLOEXEC | O_NOCTTY);
	if (tty >= 0) {
		tcsetpgrp(tty, getpgrp());
		close(tty);
	}
	signal(SIGTTOU, SIG_DFL);
	sigprocmask(SIG_SETMASK, before, NULL);
	execvp(argv[0], argv);
	int err = errno;
	fprintf(stderr, "[FATAL] exec %s failed: %s\n", argv[0], strerror(err));
	_exit(err == ENOENT ? 127 : 126);
}

// collect reaps all that has ended; it ends the process when the program is among them.
static void collect(pid_t child)
{
	for (;;) {
		int status;
		pid_t pid = waitpid(-1, &status, WNOHANG);
		if (pid <= 0)
			return;
		if (pid != child)
			continue;
		_exit(WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status));
	}
}

__attribute__((constructor)) static void init_main(int argc, char **argv, char **envp)
{
	(void)envp;
	if (argc < 1 || !called_as_init(argv[0]))
		return;
	if (argc < 3 || strcmp(argv[1], "--") != 0) {
		fprintf(stderr, "usage: %s -- PROGRAM [ARGUMENT...]\n", name);
		_exit(125);
	}
	// Signals are taken with sigwait: nothing is ever done inside a handler. Those of faults stay as they are.
	sigset_t all, before;
	sigfillset(&all);
	int faults[] = { SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGABRT, SIGSYS, SIGTTIN, SIGTTOU };
	for (size_t i = 0; i < sizeof(faults) / sizeof(*faults); i++)
		sigdelset(&all, faults[i]);
	sigprocmask(SIG_SETMASK, &all, &before);
	if (getpid() != 1)
		prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0);
	pid_t child = fork();
	if (child < 0) {
		perror("[FATAL] fork");
		_exit(125);
	}
	if (child == 0)
		run(argv + 2, &before);
	for (;;) {
		int sig;
		if (sigwait(&all, &sig) != 0)
			continue;
		if (sig == SIGCHLD)
			collect(child);
		else
			kill(child, sig);
	}
}
