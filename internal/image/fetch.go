package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
	"github.com/containerd/containerd/v2/pkg/labels"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"dolium/internal/fault"
)

// blobFetcher brings content from one repository into the content store.
type blobFetcher struct {
	s       *Store
	fetcher remotes.Fetcher
	source  map[string]string // label that says where content came from, for mounting it across repositories
}

// sourceLabel names the repository that content is from, as containerd does.
func sourceLabel(named reference.Named) map[string]string {
	domain, _, _ := strings.Cut(reference.Domain(named), ":")
	key, value := labels.LabelDistributionSource+"."+domain, reference.Path(named)
	if labels.Validate(key, value) != nil {
		return nil
	}
	return map[string]string{key: value}
}

// fetch makes sure that a blob is in the content store, held by the lease in ctx, verified. It goes on where an earlier
// attempt stopped, and shares the work with other pulls. progress gets the bytes so far; it isn't called for what was here.
func (f *blobFetcher) fetch(ctx context.Context, desc ocispec.Descriptor, progress func(int64)) error {
	if err := desc.Digest.Validate(); err != nil {
		return fault.New(errdefs.ErrInvalidArgument, "invalid digest %q: %w", desc.Digest, err)
	}
	if (images.IsManifestType(desc.MediaType) || images.IsIndexType(desc.MediaType) || images.IsConfigType(desc.MediaType)) && desc.Size > maxJSON {
		return fault.New(errdefs.ErrInvalidArgument, "%s %s is too large (%d bytes)", desc.MediaType, desc.Digest, desc.Size)
	}
	unlock, err := f.s.pulls.lock(ctx, desc.Digest.String())
	if err != nil {
		return err
	}
	defer unlock()
	wait := 500 * time.Millisecond
	for attempt := 1; ; attempt++ {
		resumed, err := f.attempt(ctx, desc, progress)
		if err == nil || ctx.Err() != nil {
			return errors.Join(ctx.Err(), err)
		}
		if errors.Is(err, errCorrupt) && resumed {
			continue // what was there from before may have been damaged; it is gone now
		}
		if attempt >= f.s.cfg.MaxDownloadAttempts || !transient(err) {
			return err
		}
		f.s.log.Info("download again", "digest", desc.Digest, "attempt", attempt, "err", err)
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return ctx.Err()
		}
		wait *= 2
	}
}

var errCorrupt = errors.New("filesystem layer verification failed")

// transient says whether trying again can help.
func transient(err error) bool {
	var status remoteerrors.ErrUnexpectedStatus
	switch {
	case errors.Is(err, errCorrupt), errdefs.IsNotFound(err), errdefs.IsInvalidArgument(err), errors.Is(err, docker.ErrInvalidAuthorization):
		return false
	case errors.As(err, &status):
		return status.StatusCode >= 500 || status.StatusCode == 429
	default:
		var de dialError
		return !errors.As(err, &de)
	}
}

func (f *blobFetcher) attempt(ctx context.Context, desc ocispec.Descriptor, progress func(int64)) (resumed bool, _ error) {
	key := remotes.MakeRefKey(ctx, ocispec.Descriptor{MediaType: desc.MediaType, Digest: desc.Digest})
	w, err := content.OpenWriter(ctx, f.s.content, content.WithRef(key), content.WithDescriptor(desc))
	if errdefs.IsAlreadyExists(err) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer w.Close()
	st, err := w.Status()
	if err != nil {
		return false, err
	}
	resumed = st.Offset > 0
	var rc io.ReadCloser = io.NopCloser(strings.NewReader(""))
	if st.Offset < desc.Size {
		if rc, err = f.fetcher.Fetch(ctx, desc); err != nil {
			return resumed, err
		}
		if seeker, ok := rc.(io.Seeker); ok {
			_, err = seeker.Seek(st.Offset, io.SeekStart)
		} else {
			_, err = io.CopyN(io.Discard, rc, st.Offset)
		}
		if err != nil {
			rc.Close()
			return resumed, err
		}
	}
	defer rc.Close()
	if progress == nil {
		progress = func(int64) {}
	}
	body := &countingReader{r: io.LimitReader(rc, desc.Size-st.Offset), n: st.Offset, told: -reportEvery, report: progress}
	n, err := io.CopyBuffer(struct{ io.Writer }{w}, body, make([]byte, 256<<10))
	if err != nil {
		return resumed, err
	}
	if st.Offset+n < desc.Size {
		return resumed, fmt.Errorf("%s: the registry sent %d bytes of %d: %w", desc.Digest, st.Offset+n, desc.Size, io.ErrUnexpectedEOF)
	}
	err = w.Commit(ctx, desc.Size, desc.Digest, content.WithLabels(f.source))
	if errdefs.IsAlreadyExists(err) {
		return resumed, nil
	}
	if errdefs.IsFailedPrecondition(err) {
		// The bytes are wrong. They must go, or the next attempt would only find them complete and wrong again.
		w.Close()
		if aerr := f.s.content.Abort(context.WithoutCancel(ctx), key); aerr != nil && !errdefs.IsNotFound(aerr) {
			f.s.log.Warn("discard a corrupt download", "digest", desc.Digest, "err", aerr)
		}
		return resumed, fault.New(errCorrupt, "filesystem layer verification failed for digest %s", desc.Digest)
	}
	return resumed, err
}
