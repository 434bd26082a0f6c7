import ApertusKit
import CryptoKit
import Foundation
import Observation

/// Fetches a model folder file by file, and goes on where it stopped.
///
/// The folder's manifest says which files there are, their sizes and SHA-256. A file is written
/// beside its place, hashed, and moved there when it is right; only then does it count. When all
/// are there the folder is moved to its own place: a folder that has a name is whole.
@MainActor
@Observable
final class FolderDownload {
    enum State: Equatable {
        case idle
        case running(done: Int, total: Int)
        case failed(String)
        case done(URL)
    }

    private(set) var state = State.idle
    private var task: Task<Void, Never>?

    /// Fetch the folder at `address`, or go on with it.
    func start(_ address: URL) {
        task?.cancel()
        state = .running(done: 0, total: 0)
        task = Task {
            do {
                let fetcher = FolderFetcher(address: address, models: ModelFolders.downloads)
                let folder = try await fetcher.fetch { done, total in
                    Task { @MainActor [weak self] in
                        if case .running = self?.state {
                            self?.state = .running(done: done, total: total)
                        }
                    }
                }
                state = .done(folder)
            } catch is CancellationError {
                state = .idle
            } catch let error as URLError where error.code == .cancelled {
                state = .idle
            } catch {
                state = .failed("\(error)")
            }
        }
    }

    /// Stop; what has been fetched stays.
    func pause() { task?.cancel() }
}

/// The work of a download, on no actor.
struct FolderFetcher: Sendable {
    let address: URL
    /// Where finished folders go.
    let models: URL

    typealias Progress = @Sendable (_ done: Int, _ total: Int) -> Void

    func fetch(_ progress: @escaping Progress) async throws -> URL {
        let name = address.lastPathComponent
        guard address.scheme == "https", !name.isEmpty, name != "/", !name.hasPrefix(".") else {
            throw ApertusError(.usage, "\(address): expected the https address of a folder")
        }
        let finished = models.appending(path: name, directoryHint: .isDirectory)
        let part = models.appending(path: ".\(name).part", directoryHint: .isDirectory)
        try FileManager.default.createDirectory(at: part, withIntermediateDirectories: true)
        let (text, response) = try await URLSession.shared.data(
            from: address.appending(path: Manifest.fileName))
        try requireSuccess(response, Manifest.fileName)
        try text.write(to: part.appending(path: Manifest.fileName), options: .atomic)
        guard let manifest = try Manifest(folder: part) else {
            throw ApertusError(.notFound, "\(address): has no manifest")
        }
        let total = manifest.files.values.reduce(0) { $0 + $1.byteCount }
        try requireSpace(total, for: part)
        var done = 0
        for (file, record) in manifest.files.sorted(by: { $0.key < $1.key }) {
            let before = done
            try await fetch(file, record, into: part) { progress(before + $0, total) }
            done += record.byteCount
            progress(done, total)
        }
        if FileManager.default.fileExists(atPath: finished.path(percentEncoded: false)) {
            try FileManager.default.removeItem(at: finished)
        }
        try FileManager.default.moveItem(at: part, to: finished)
        return finished
    }

    /// One file, from the byte on up to which it is there.
    private func fetch(
        _ file: String, _ record: Manifest.FileRecord, into folder: URL,
        _ progress: @escaping @Sendable (Int) -> Void
    ) async throws {
        let place = folder.appending(path: file)
        if size(of: place) == record.byteCount { return }  // moved there once its hash was right
        let part = folder.appending(path: file + ".part")
        var held = size(of: part) ?? 0
        if held > record.byteCount {
            try FileManager.default.removeItem(at: part)
            held = 0
        }
        if held < record.byteCount || record.byteCount == 0 {
            try await append(file, from: held, upTo: record.byteCount, to: part, progress)
        }
        guard try sha256(part) == record.sha256 else {
            try FileManager.default.removeItem(at: part)
            throw ApertusError(.rejected, "\(file): arrived damaged; fetch it again")
        }
        try FileManager.default.moveItem(at: part, to: place)
    }

    /// Write what is missing behind what is there.
    private func append(
        _ file: String, from held: Int, upTo size: Int, to part: URL,
        _ progress: @Sendable (Int) -> Void
    ) async throws {
        var request = URLRequest(url: address.appending(path: file))
        if held > 0 { request.setValue("bytes=\(held)-", forHTTPHeaderField: "Range") }
        let (bytes, response) = try await URLSession.shared.bytes(for: request)
        try requireSuccess(response, file)
        let path = part.path(percentEncoded: false)
        // A server that sends all of it again has not understood the range.
        let goesOn = (response as? HTTPURLResponse)?.statusCode == 206
        if !goesOn || held == 0 { _ = FileManager.default.createFile(atPath: path, contents: nil) }
        let handle = try FileHandle(forWritingTo: part)
        defer { try? handle.close() }
        var done = Int(try handle.seekToEnd())
        var block = Data(capacity: 1 << 20)
        for try await byte in bytes {
            block.append(byte)
            guard block.count == 1 << 20 else { continue }
            try handle.write(contentsOf: block)
            done += block.count
            block.removeAll(keepingCapacity: true)
            guard done <= size else { break }
            progress(done)
        }
        try handle.write(contentsOf: block)
        done += block.count
        guard done == size else {
            if done > size { try? FileManager.default.removeItem(at: part) }
            throw ApertusError(
                .notFound, "\(file): the connection ended at \(done) of \(size) bytes")
        }
    }

    private func requireSuccess(_ response: URLResponse, _ file: String) throws {
        let status = (response as? HTTPURLResponse)?.statusCode ?? 0
        guard status == 200 || status == 206 else {
            throw ApertusError(.notFound, "\(file): the server answers \(status)")
        }
    }

    private func requireSpace(_ total: Int, for folder: URL) throws {
        let keys: Set<URLResourceKey> = [.volumeAvailableCapacityForImportantUsageKey]
        let free = try folder.resourceValues(forKeys: keys).volumeAvailableCapacityForImportantUsage
        let held =
            (try? FileManager.default.contentsOfDirectory(
                at: folder, includingPropertiesForKeys: nil)) ?? []
        let missing = Int64(total - held.reduce(0) { $0 + (size(of: $1) ?? 0) })
        if let free, free < missing {
            throw ApertusError(
                .resource,
                "the model needs \(missing.formatted(.byteCount(style: .file))), "
                    + "\(free.formatted(.byteCount(style: .file))) are free")
        }
    }

    private func size(of file: URL) -> Int? {
        let path = file.path(percentEncoded: false)
        return (try? FileManager.default.attributesOfItem(atPath: path))?[.size] as? Int
    }

    /// Of a file, a block at a time.
    private func sha256(_ file: URL) throws -> String {
        let handle = try FileHandle(forReadingFrom: file)
        defer { try? handle.close() }
        var hash = SHA256()
        while let block = try handle.read(upToCount: 1 << 20), !block.isEmpty {
            try Task.checkCancellation()
            hash.update(data: block)
        }
        return hash.finalize().map { ($0 < 16 ? "0" : "") + String($0, radix: 16) }.joined()
    }
}
