package image

import (
	"context"
	"slices"

	"github.com/moby/moby/api/types/image"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// History lists the steps an image was made in, the last one first. Error: ErrNotFound.
func (s *Store) History(ctx context.Context, ref string, p *ocispec.Platform) ([]image.HistoryResponseItem, error) {
	record, err := s.lookup(ref)
	if err != nil {
		return nil, err
	}
	img, err := s.open(ctx, record.Target, p, ref)
	if err != nil {
		return nil, err
	}
	_, sizes, err := s.unpackedSizes(ctx, img.Config.RootFS.DiffIDs)
	if err != nil {
		return nil, err
	}
	items := []image.HistoryResponseItem{}
	for _, h := range img.Config.History {
		item := image.HistoryResponseItem{ID: "<missing>", Comment: h.Comment, CreatedBy: h.CreatedBy}
		if h.Created != nil {
			item.Created = h.Created.Unix()
		}
		if !h.EmptyLayer && len(sizes) > 0 {
			item.Size, sizes = sizes[0], sizes[1:]
		}
		items = append(items, item)
	}
	slices.Reverse(items)
	// The image itself, and the images here that it was made from, are known by their IDs.
	id := record.Target.Digest
	for i := range items {
		records := s.names.withTarget(id)
		if len(records) == 0 {
			break
		}
		items[i].ID = id.String()
		items[i].Tags, _ = repoNames(records)
		parent := ""
		for _, r := range records {
			parent = r.Labels[parentLabel]
		}
		if parent == "" {
			break
		}
		id = digest.Digest(parent)
	}
	return items, nil
}
