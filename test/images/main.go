// Images makes the base images for tests and the demonstration from the packages of the system it runs on; see package
// mk.
//
//	go run ./test/images -out DIR [names...]         archives for docker load
//	go run ./test/images serve -addr HOST:PORT [names...]   a registry that has them
//	go run ./test/images list
package main

import (
	"context"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"dolium/test/images/mk"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "images:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	if len(args) > 0 && args[0] == "list" {
		for _, n := range mk.Names() {
			fmt.Println(n)
		}
		return nil
	}
	serve := len(args) > 0 && args[0] == "serve"
	if serve {
		args = args[1:]
	}
	flags := flag.NewFlagSet("images", flag.ExitOnError)
	cache := flags.String("cache", defaultCache(), "directory to keep what was made")
	module := flags.String("module", ".", "directory inside this module")
	out := flags.String("out", "", "directory to write archives to")
	addr := flags.String("addr", "127.0.0.1:5055", "address of the registry (serve)")
	root := flags.String("root", "", "directory of the registry's content; empty keeps it in memory (serve)")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if !serve && *out == "" {
		return fmt.Errorf("say where to write with -out DIR, or serve")
	}
	b, err := mk.New(*cache, *module, slog.New(slog.NewTextHandler(os.Stderr, nil)))
	if err != nil {
		return err
	}
	images, err := b.Build(ctx, flags.Args()...)
	if err != nil {
		return err
	}
	if *out != "" {
		if err := os.MkdirAll(*out, 0o755); err != nil {
			return err
		}
		for _, img := range images {
			path, err := img.Save(*out)
			if err != nil {
				return err
			}
			fmt.Println(path)
		}
	}
	if !serve {
		return nil
	}
	return serveImages(ctx, *addr, *root, images)
}

func serveImages(ctx context.Context, addr, root string, images []*mk.Image) error {
	r, err := mk.Serve(ctx, addr, root)
	if err != nil {
		return err
	}
	defer r.Close()
	for _, img := range images {
		if err := img.Push(ctx, r.Addr); err != nil {
			return err
		}
	}
	fmt.Printf("serving on http://%s\n", r.Addr)
	<-ctx.Done()
	return nil
}

// defaultCache is one for all on the machine, or the user's own.
func defaultCache() string {
	if os.Getuid() == 0 {
		return mk.DefaultCache
	}
	dir, err := os.UserCacheDir()
	if err != nil {
		return mk.DefaultCache
	}
	return filepath.Join(dir, "dolium-images")
}
