# Dolium. `make demo` shows it, `make test` tests it; the rest is for developing it.
GO ?= go
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
COMMIT ?= $(shell git rev-parse --short HEAD 2>/dev/null || echo unknown)
PREFIX ?= /usr/local
LDFLAGS = -s -w -X dolium/internal/daemonconf.Version=$(VERSION) -X dolium/internal/daemonconf.Commit=$(COMMIT)
GOBUILD = $(GO) build -tags seccomp -ldflags '$(LDFLAGS)'

BUILDX = github.com/docker/buildx
COMPOSE = github.com/docker/compose/v5
# version: of a module of Docker's in plugins/go.mod
version = $(shell sed -n 's|.*github.com/docker/$(1) \(v[0-9.]*\).*|\1|p' plugins/go.mod)

.PHONY: all build plugins deps demo demo-stop test unit e2e lint bench install uninstall clean

all: build

## build: the binaries, the plugins that come with the CLI, and a kernel for virtual machines, in bin/
build: deps plugins
	@mkdir -p bin
	CGO_ENABLED=0 $(GOBUILD) -o bin/dolium ./cmd/dolium
	CGO_ENABLED=0 $(GOBUILD) -o bin/doliumd ./cmd/doliumd
	# Static, since --init mounts it into containers; without seccomp it refuses to start any.
	CGO_ENABLED=1 $(GO) build -tags 'seccomp netgo osusergo' -ldflags '$(LDFLAGS) -extldflags -static' -o bin/dolium-keeper ./cmd/dolium-keeper
	CGO_ENABLED=0 $(GOBUILD) -o bin/dolium-guest ./cmd/dolium-guest
	CGO_ENABLED=0 $(GOBUILD) -o bin/dolium-guest-files ./cmd/dolium-guest-files
	@scripts/kernel.sh bin/kernels || echo "virtual machines have no kernel yet, see docs/vm.md" >&2
	@scripts/novnc.sh bin/novnc || echo "virtual machines have no console in the browser yet, see docs/vm.md" >&2

## plugins: buildx as it is, and Compose with the old formats of its files
plugins: deps
	@mkdir -p bin/cli-plugins
	cd plugins && CGO_ENABLED=0 $(GO) build -ldflags '-s -w -X $(BUILDX)/version.Version=$(call version,buildx)' -o ../bin/cli-plugins/docker-buildx $(BUILDX)/cmd/buildx
	cd plugins && CGO_ENABLED=0 $(GO) build -ldflags '-s -w -X main.version=$(call version,compose/v5) -X $(COMPOSE)/internal.Version=$(call version,compose/v5)' -o ../bin/cli-plugins/docker-compose ./compose

## deps: the packages that building needs, where they are missing
deps:
	@scripts/deps.sh build

## demo: install what is missing, build, start the daemon and run the voting app
demo: build
	@scripts/demo.sh

## demo-stop: stop what `make demo` started
demo-stop:
	@scripts/demo-stop.sh

## test: everything that must hold; prints what it skipped and why
test:
	@scripts/test.sh

## unit, e2e: parts of it
unit:
	@scripts/test.sh unit
e2e:
	@scripts/test.sh e2e

lint:
	@scripts/test.sh lint

## bench: speed and memory beside the peers that are installed (see docs/bench.md)
bench: build
	$(GO) run ./bench

## install: binaries and a systemd unit; restarting the daemon leaves workloads running
install: build
	install -d $(DESTDIR)$(PREFIX)/bin
	install -m 0755 bin/dolium bin/doliumd bin/dolium-keeper bin/dolium-guest bin/dolium-guest-files $(DESTDIR)$(PREFIX)/bin/
	install -d $(DESTDIR)$(PREFIX)/lib/dolium/cli-plugins
	for d in kernels novnc; do [ ! -d bin/$$d ] || cp -r bin/$$d $(DESTDIR)$(PREFIX)/lib/dolium/; done
	install -m 0755 bin/cli-plugins/* $(DESTDIR)$(PREFIX)/lib/dolium/cli-plugins/
	@PREFIX=$(PREFIX) DESTDIR=$(DESTDIR) packaging/install-units.sh

uninstall:
	@PREFIX=$(PREFIX) DESTDIR=$(DESTDIR) packaging/install-units.sh --remove
	rm -f $(addprefix $(DESTDIR)$(PREFIX)/bin/,dolium doliumd dolium-keeper dolium-guest dolium-guest-files)
	rm -rf $(DESTDIR)$(PREFIX)/lib/dolium

clean:
	rm -rf bin
